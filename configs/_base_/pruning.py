# Pruning while a trained detector is tuned on: 30 % of the backbone's weights by magnitude, a little more
# before each of the first epochs (Zhu and Gupta 2017), then training with what is left. 30 % is what
# Muhawenayo ("Compressed Objects Detection") prunes without loss; the backbone is his, with the neck.
# mmengine lets no two bases set the same key, so the hooks have a name of their own here:
# custom_hooks = _base_.custom_hooks + _base_.pruning_hooks
pruning_hooks = [
    dict(
        type='PruningHook',
        blocks=[dict(name='backbone', modules=['backbone', 'neck'], target=0.3)],
        schedule='cubic',
        start=0,
        end=3)
]
