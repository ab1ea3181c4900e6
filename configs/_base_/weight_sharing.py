# Weights of a trained, perhaps pruned detector share 16 values per layer, which are then tuned (Han et al. 2016,
# "Deep Compression"). What is zero stays zero. A value moves thousands of weights: let the learning rate be a
# tenth of the training's, or less.
# mmengine lets no two bases set the same key, so the hooks have a name of their own here:
# custom_hooks = _base_.custom_hooks + _base_.sharing_hooks
sharing_hooks = [dict(type='WeightSharingHook', blocks=[dict(name='all', modules=['*'], bits=4)])]
