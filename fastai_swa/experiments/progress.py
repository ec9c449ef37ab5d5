"""Where the seeds under way stand, for who waits for them."""

import shutil
from time import monotonic

__all__ = ['ProgressLines']


class ProgressLines:
    "A line for each seed, written over on a terminal; elsewhere written anew once a minute."

    def __init__(self, stream):
        self.stream, self.in_place, self.texts, self.times = stream, stream.isatty(), {}, {}

    def show(self, key, text):
        # a longer one would take two lines
        text = text[: shutil.get_terminal_size().columns - 1] if self.in_place else text
        if self.in_place:
            up = f'\033[{len(self.texts)}A' if self.texts else ''
            self.texts[key] = text
            self.stream.write(up + ''.join(f'\033[2K{t}\n' for t in self.texts.values()))
        else:
            self.texts[key] = text
            if monotonic() - self.times.get(key, -60) < 60:
                return
            self.times[key] = monotonic()
            self.stream.write(text + '\n')
        self.stream.flush()

    def end(self):
        if not self.in_place:
            self.stream.writelines(f'{text}\n' for text in self.texts.values())
