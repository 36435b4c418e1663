"""What a run depends on: its settings, read from a preset and from the command line's flags.

fields.py   every setting, its help text and the words that it may be
preset.py   a preset (TOML) with changes on top, checked once
flags.py    the command line's flag for every setting
seeds.py    every draw is decided by (seed, round, client)
"""

from integration.settings.fields import Settings, SettingsError
from integration.settings.preset import PRESETS, from_preset, from_values

__all__ = ["PRESETS", "Settings", "SettingsError", "from_preset", "from_values"]
