"""The local web page on which one draws from models (`maskdm app`)."""
