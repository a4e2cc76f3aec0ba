"""Judges what was learned: numbers, labeled data sets, reports, figures."""
