"""Turn text into token files, and token files into batches."""

import re

# names of a dataset's token files, loss masks and lengths of documents
TOKEN_FILE = re.compile(r'(train|val)(_mask|(_documents)?(-\d{5})?)\.bin')
