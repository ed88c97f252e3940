"""The survey, runnable: every system on one data set, one budget, one protocol."""
