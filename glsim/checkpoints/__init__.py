"""Models on disk: bundles, other formats, exports, the Hub."""
