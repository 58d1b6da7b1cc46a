"""What a run does and what it does to the machine: recorded, sampled, exported. Changes nothing of it."""
