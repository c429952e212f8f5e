"""Calibration: texts, cut into token windows."""
