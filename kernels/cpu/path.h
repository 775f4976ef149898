// The vectors (struct Vector) of the path that a file is compiled for; the build defines LOPRO_PATH as its name.
#pragma once

#define LOPRO_TEXT(x) #x
#define LOPRO_HEADER(path) LOPRO_TEXT(cpu/path.h)
#include LOPRO_HEADER(LOPRO_PATH)
