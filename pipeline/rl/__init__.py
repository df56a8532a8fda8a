"""The algorithm: plans of groups, the ledger, advantages, objectives and samplers. No models, no actors."""
