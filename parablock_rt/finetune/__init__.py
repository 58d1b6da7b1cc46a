"""The reference fine-tuning of causal language models: loop, models, data. Only here is transformers used."""
