"""The conformance suite: what every backend must do, each property a test of its own. See `clipcore.testing`."""
