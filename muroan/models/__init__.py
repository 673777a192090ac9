"""Target models: `base` is the contract, then one file a model or fusion."""
