"""Measurements of models: accuracy, confidence, localisation, cost."""
