"""Stage `validate`: records checked, set aside, given their side, and made into tables."""
