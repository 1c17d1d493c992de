"""The emoji data set: the same contents drawn in many styles."""
