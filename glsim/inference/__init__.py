"""Answers for images: predictor, index, bulk jobs, server."""
