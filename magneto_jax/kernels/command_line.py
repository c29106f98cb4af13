"""What the commands of this folder share."""

import argparse


class Parser(argparse.ArgumentParser):
  """With errors of one line."""

  def error(self, message):
    self.exit(2, f"{self.prog}: {message}\n")
