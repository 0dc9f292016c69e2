"""The emoji: their data set, and the classifier in whose features they are compared."""
