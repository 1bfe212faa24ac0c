"""A page to look into a checkpoint by hand: `python -m maskvit explore`.

`look.py` holds the arithmetic, arrays in and arrays out; `samples.py` finds the files; `answers.py` turns arrays into what the page asks
for, plain data; `server.py` speaks HTTP; `page.py` is the page, served or written with everything in it.
"""
