"""What a detector costs and finds, measured on data: calibration, records, FLOPs, latencies."""
