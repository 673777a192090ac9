"""Defences: how a model is retrained so that attacks on it fail, each with its own `training_step`."""
