"""Detectors in ONNX Runtime or OpenVINO, in float32 and in integers of 8 bits."""
