"""A run as one self-contained page: `write_page` in `page.py`."""
