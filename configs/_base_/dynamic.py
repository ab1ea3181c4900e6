# What every dynamic detector's config has beside its model. mmengine lets no two bases set the same
# key, so the hooks have a name of their own here.
custom_imports = dict(imports=['dynamicdet'])
randomness = dict(seed=0)
dynamic_hooks = [
    dict(type='ResumeHook'),
    dict(type='FiniteLossHook'),
    dict(type='LoadedWeightsHook'),
    dict(type='ValidationExitsHook')
]
