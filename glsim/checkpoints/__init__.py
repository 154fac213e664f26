"""Models on disk: bundles, other formats, exports, the Hub. Checkpoints of a run are in `training/resume.py`."""
