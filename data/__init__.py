"""Turn text into token files, and token files into batches."""

import re

TOKEN_FILE = re.compile(r'(train|val)(-\d{5}|_mask)?\.bin')  # names of a dataset's token files
