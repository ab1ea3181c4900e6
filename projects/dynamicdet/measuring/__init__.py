"""Calibration, recording and measuring of detectors."""
