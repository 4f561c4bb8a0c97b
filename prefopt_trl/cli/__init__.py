import logging

# It complains when it is imported that a CPU kernel is not installed, which nothing here uses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
