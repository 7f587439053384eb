"""Which script a text is written in, for the rooms that know no data: see `trimtab.data.scripts`."""

from trimtab.data.scripts import default_context, default_templates, is_latin

__all__ = ["default_context", "default_templates", "is_latin"]
