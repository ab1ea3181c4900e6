# Quantization-aware training of a trained detector: its last epochs in 8 bits, of which the last ranges are
# exported (tools/export.py --int8). noise below 1 rounds a random part of the weights in each pass.
# mmengine lets no two bases set the same key, so the hooks have a name of their own here:
# custom_hooks = _base_.custom_hooks + _base_.quantization_hooks
quantization_hooks = [dict(type='QuantizationHook', start=0, noise=1.0, reduced_range=False)]
