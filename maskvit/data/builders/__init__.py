"""Data sets we write ourselves: `scenes`, and a folder of pictures. TFDS builders, `array_record` files, no TensorFlow.

`python -m maskvit data scenes --data_dir D` and `... folder --root R --data_dir D --name N` prepare them.
"""

from __future__ import annotations

from typing import Any

BUILDERS = ("folder", "scenes")


def prepare(builder: str, data_dir: str, **settings: Any) -> str:
    """Prepare a data set unless it is there already, complete and made with the same settings.

    Args:
      builder: "scenes" or "folder".
      data_dir: TFDS's root; the data land in <data_dir>/<name>/1.0.0.
      settings: arguments of `builders.scenes.Scenes` or `builders.folder.Folder`.

    Returns: the folder that holds the data set.

    Raises:
      ValueError: unknown builder; or the folder holds a data set made with other settings.
      FolderError: what is wrong with the pictures of a folder, as one list.
    """
    if builder == "scenes":
        from maskvit.data.builders.scenes import Scenes

        return Scenes(data_dir=data_dir, **settings).prepare()
    if builder == "folder":
        from maskvit.data.builders.folder import Folder

        return Folder(data_dir=data_dir, **settings).prepare()
    raise ValueError(f"builder {builder!r} is unknown; known: {', '.join(BUILDERS)}")
