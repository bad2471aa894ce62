"""Keep what a script prints from ending it in the wrong way.

    output.protect(drop=True)    # a run: lines that cannot be written are dropped
    output.protect()             # a filter: it ends with its reader, such as head
"""

import io
import os
import sys


class Output:
    """Wrap a text stream whose file may be full, closed or gone.

    drop: True drops what cannot be written, and `lost` holds the reason. False ends the script:
    without a word where the reader of a pipe has gone, else with the reason.
    """

    def __init__(self, stream, drop):
        self.stream, self.drop, self.lost = stream, drop, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def isatty(self):
        try:
            return self.stream.isatty()
        except (AttributeError, ValueError):  # a notebook's, or closed
            return False

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments, **options):
        """Call a function of the stream."""
        try:
            function(*arguments, **options)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            is_first, self.lost = self.lost is None, self.lost or str(error)
            if is_first and not self.drop:
                raise SystemExit(1 if isinstance(error, BrokenPipeError) else
                                 f'error: the output could not be written: {error}') from None


def protect(drop=False):
    """Replace sys.stdout and sys.stderr by streams that are there and never raise.

    A closed descriptor becomes os.devnull: the next file to be opened would take its number, and
    get what a library prints. Characters that a terminal lacks are printed as '?'. Standard error
    is always dropped where it cannot be written. drop: see Output, for standard output.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, drops in (('stdout', drop), ('stderr', True)):
        stream = getattr(sys, name)
        if isinstance(stream, Output):
            stream = stream.stream
        if stream is None or getattr(stream, 'closed', False):
            stream = open(os.devnull, 'w', encoding='utf-8')
        output = Output(stream, drops)
        if isinstance(stream, io.TextIOWrapper):  # a notebook has streams of its own
            # this writes what was printed before
            output.attempt(stream.reconfigure, errors='replace', line_buffering=True)
        setattr(sys, name, output)
