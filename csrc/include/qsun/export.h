#pragma once

// Everything in libqsun is hidden except what carries this mark.
#define QSUN_API [[gnu::visibility("default")]]
