"""Explanations of models: heat-maps, contrasts, representations, and their pictures."""
