"""Draw calibration documents."""

from replaceme.calibration import calibrate
from replaceme.entry import stage

if __name__ == "__main__":
    stage(calibrate)
