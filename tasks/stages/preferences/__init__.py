"""Stage `preferences`: labelled pairs become a data set."""
