"""The reference fine-tuning of causal language models: loop, models, data. Only here and in `integrations` is
transformers used."""
