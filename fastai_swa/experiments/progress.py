"""Where the seeds under way stand, for who waits for them."""

import shutil
from time import monotonic

__all__ = ['ProgressLines']

_SECONDS = 60  # between two lines of a seed, where they are not written over


class ProgressLines:
    "A line for each seed, written over on a terminal; elsewhere written anew once a minute."

    def __init__(self, stream):
        self.stream = stream
        self.in_place = stream.isatty()
        self.texts = {}  # seed -> its line
        self.times = {}  # seed -> when that was written, where lines are not written over

    def show(self, seed: int, text: str):
        if self.in_place:
            self._write_over(seed, text)
        else:
            self._write_anew(seed, text)

    def _write_over(self, seed, text):
        up = f'\033[{len(self.texts)}A' if self.texts else ''
        self.texts[seed] = text[: shutil.get_terminal_size().columns - 1]  # a longer one would take two lines
        lines = [f'\033[2K{line}\n' for line in self.texts.values()]
        self.stream.write(up + ''.join(lines))
        self.stream.flush()

    def _write_anew(self, seed, text):
        self.texts[seed] = text
        now = monotonic()
        if seed in self.times and now - self.times[seed] < _SECONDS:
            return
        self.times[seed] = now
        self.stream.write(text + '\n')
        self.stream.flush()

    def end(self):
        "Write the last line of each seed, where it may not have been written."
        if not self.in_place:
            self.stream.writelines(f'{text}\n' for text in self.texts.values())
