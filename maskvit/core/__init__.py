"""What every part of the package shares: types, modalities, patches, randomness, configs, errors. Imports nothing of the others."""
