"""`python -m maskvit worth`: whether continued pretraining helped, by fine-tuning from scratch, the import and the continued checkpoint."""
