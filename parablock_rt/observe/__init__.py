"""Records what a run does, samples the machine under it, and exports both. Never changes the run."""
