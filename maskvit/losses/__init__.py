"""Losses: of pixels, of self-distillation, of a ranking; and guidance as weight of a token's loss."""
