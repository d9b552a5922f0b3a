"""Stage `generate`: responses to be labelled."""
