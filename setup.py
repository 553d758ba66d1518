"Package metadata, read from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

statuses = [
    '1 - Planning',
    '2 - Pre-Alpha',
    '3 - Alpha',
    '4 - Beta',
    '5 - Production/Stable',
    '6 - Mature',
    '7 - Inactive',
]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    license='Apache-2.0',
    url=cfg['git_url'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=[
        f'Development Status :: {statuses[int(cfg["status"]) - 1]}',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        'Programming Language :: Python :: 3',
    ],
    packages=find_packages(include=[cfg['lib_name'], f'{cfg["lib_name"]}.*']),
    package_dir={'': '.'},
    package_data={cfg['lib_name']: ['py.typed']},
    zip_safe=False,
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require=dict(dev=cfg['dev_requirements'].split()),
    entry_points=dict(
        console_scripts=cfg['console_scripts'].split(),
        nbdev=[f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d'],
    ),
)
