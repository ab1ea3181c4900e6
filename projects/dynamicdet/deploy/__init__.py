"""Detectors in ONNX Runtime, in float32 and in integers of 8 bits."""
