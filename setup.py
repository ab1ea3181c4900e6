"""The package lives in projects/dynamicdet; setup.cfg holds its metadata."""

from pathlib import Path

from setuptools import find_packages, setup


def requirements(name):
    """The requirements in requirements/<name>.txt, without comments."""
    path = Path(__file__).parent / 'requirements' / f'{name}.txt'
    lines = (line.split('#')[0].strip() for line in path.read_text(encoding='utf-8').splitlines())
    return [line for line in lines if line]


setup(
    python_requires='>=3.11',
    package_dir={'': 'projects'},
    packages=find_packages('projects'),
    py_modules=['dynamicdet_options'],
    package_data={'dynamicdet.reports': ['page.*'], 'dynamicdet.web': ['page.*', 'viewer.*']},
    install_requires=requirements('runtime'),
    extras_require={
        name: requirements(name)
        for name in (
            'mm',
            'compression',
            'video',
            'deploy',
            'openvino',
            'serve',
            'bulk',
            'ray',
            'web',
            'tests',
        )
    },
)
