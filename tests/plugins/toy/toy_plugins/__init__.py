"""A distribution that adds one probe, one data set, one encoder and one report format to msn-eval."""
