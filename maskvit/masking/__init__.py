"""Which tokens are masked: scores say in which order, budgets how many of each modality, `plan` turns both into a `MaskPlan`."""
