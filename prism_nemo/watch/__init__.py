"""A live page of a running stage, and the same in a terminal.

`state.py` reads a run's directory and says what is shown; `thin.py` makes curves small; `server.py` serves it on this
machine only; `page.html`, `page.js` and `page.css` show it; `terminal.py` shows it with rich.

Nothing here writes. A run's directory is not trusted: prompts and answers come from models, and the directory may come
from somebody else.
"""
