"""Image encoders: one file a backbone."""
