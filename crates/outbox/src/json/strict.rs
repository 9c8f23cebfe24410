//! A serializer that writes nothing and finds what JSON cannot hold.

use std::fmt::{self, Display};

use serde::ser::{self, Serialize, Serializer};

use super::Step;

/// What was found, and the way to it from the inside out.
#[derive(Debug)]
pub(super) struct Refusal {
    inner_first: Vec<Step>,
    pub(super) why: String,
}

impl Refusal {
    fn new(why: impl Into<String>) -> Self {
        Self { inner_first: Vec::new(), why: why.into() }
    }

    fn within(mut self, step: Step) -> Self {
        self.inner_first.push(step);
        self
    }

    pub(super) fn path(&self) -> impl Iterator<Item = Step> {
        self.inner_first.iter().rev().cloned()
    }
}

impl Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Refusal {}

impl ser::Error for Refusal {
    fn custom<T: Display>(why: T) -> Self {
        Self::new(why.to_string())
    }
}

/// Goes through the value as a serializer would.
pub(super) fn check(value: &impl Serialize) -> Result<(), Refusal> {
    value.serialize(Check)
}

struct Check;

impl Check {
    fn float(finite: bool) -> Result<(), Refusal> {
        if finite { Ok(()) } else { Err(Refusal::new("is NaN or infinite, which JSON cannot hold")) }
    }
}

/// Values that JSON always holds.
macro_rules! fine {
    ($($method:ident($type:ty),)*) => {
        $(fn $method(self, _: $type) -> Result<(), Refusal> {
            Ok(())
        })*
    };
}

impl Serializer for Check {
    type Ok = ();
    type Error = Refusal;
    type SerializeSeq = Parts;
    type SerializeTuple = Parts;
    type SerializeTupleStruct = Parts;
    type SerializeTupleVariant = Parts;
    type SerializeMap = Parts;
    type SerializeStruct = Parts;
    type SerializeStructVariant = Parts;

    fine! {
        serialize_bool(bool),
        serialize_i8(i8),
        serialize_i16(i16),
        serialize_i32(i32),
        serialize_i64(i64),
        serialize_i128(i128),
        serialize_u8(u8),
        serialize_u16(u16),
        serialize_u32(u32),
        serialize_u64(u64),
        serialize_u128(u128),
        serialize_char(char),
        serialize_str(&str),
        serialize_unit_struct(&'static str),
    }

    fn serialize_f32(self, number: f32) -> Result<(), Refusal> {
        Self::float(number.is_finite())
    }

    fn serialize_f64(self, number: f64) -> Result<(), Refusal> {
        Self::float(number.is_finite())
    }

    fn serialize_bytes(self, _: &[u8]) -> Result<(), Refusal> {
        Err(Refusal::new("is bytes, which JSON cannot hold: encode it as text, or use publish_raw"))
    }

    fn serialize_none(self) -> Result<(), Refusal> {
        Ok(())
    }

    fn serialize_some<T: ?Sized + Serialize>(self, value: &T) -> Result<(), Refusal> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), Refusal> {
        Ok(())
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<(), Refusal> {
        Ok(())
    }

    fn serialize_newtype_struct<T: ?Sized + Serialize>(self, _: &'static str, value: &T) -> Result<(), Refusal> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: ?Sized + Serialize>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), Refusal> {
        value.serialize(self).map_err(|refusal| refusal.within(Step::Name(variant.into())))
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Parts, Refusal> {
        Ok(Parts::of(None))
    }

    fn serialize_tuple(self, _: usize) -> Result<Parts, Refusal> {
        Ok(Parts::of(None))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Parts, Refusal> {
        Ok(Parts::of(None))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Parts, Refusal> {
        Ok(Parts::of(Some(variant)))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Parts, Refusal> {
        Ok(Parts::of(None))
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Parts, Refusal> {
        Ok(Parts::of(None))
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Parts, Refusal> {
        Ok(Parts::of(Some(variant)))
    }
}

/// The parts of a list, a map or a struct, one after the other.
struct Parts {
    variant: Option<&'static str>,
    index: usize,
    key: Option<String>,
}

impl Parts {
    fn of(variant: Option<&'static str>) -> Self {
        Self { variant, index: 0, key: None }
    }

    fn part(&self, value: &(impl Serialize + ?Sized), step: impl FnOnce() -> Step) -> Result<(), Refusal> {
        value.serialize(Check).map_err(|refusal| {
            let refusal = refusal.within(step());
            match self.variant {
                Some(variant) => refusal.within(Step::Name(variant.into())),
                None => refusal,
            }
        })
    }

    fn element(&mut self, value: &(impl Serialize + ?Sized)) -> Result<(), Refusal> {
        let index = self.index;
        self.index += 1;
        self.part(value, || Step::Index(index))
    }

    fn field(&mut self, name: &'static str, value: &(impl Serialize + ?Sized)) -> Result<(), Refusal> {
        self.part(value, || Step::Name(name.into()))
    }
}

/// Lists and their kin differ only in the method's name.
macro_rules! elements {
    ($($kind:ident::$method:ident,)*) => {
        $(impl ser::$kind for Parts {
            type Ok = ();
            type Error = Refusal;

            fn $method<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), Refusal> {
                self.element(value)
            }

            fn end(self) -> Result<(), Refusal> {
                Ok(())
            }
        })*
    };
}

elements! {
    SerializeSeq::serialize_element,
    SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field,
    SerializeTupleVariant::serialize_field,
}

macro_rules! fields {
    ($($kind:ident,)*) => {
        $(impl ser::$kind for Parts {
            type Ok = ();
            type Error = Refusal;

            fn serialize_field<T: ?Sized + Serialize>(&mut self, name: &'static str, value: &T) -> Result<(), Refusal> {
                self.field(name, value)
            }

            fn end(self) -> Result<(), Refusal> {
                Ok(())
            }
        })*
    };
}

fields! {
    SerializeStruct,
    SerializeStructVariant,
}

impl ser::SerializeMap for Parts {
    type Ok = ();
    type Error = Refusal;

    fn serialize_key<T: ?Sized + Serialize>(&mut self, key: &T) -> Result<(), Refusal> {
        match serde_json::to_value(key) {
            Ok(serde_json::Value::String(key)) => {
                self.key = Some(key);
                Ok(())
            }
            _ => Err(Refusal::new("is a map whose keys are no strings")),
        }
    }

    fn serialize_value<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), Refusal> {
        let key = self.key.take();
        self.part(value, || key.map_or(Step::Unknown, Step::Name))
    }

    fn end(self) -> Result<(), Refusal> {
        Ok(())
    }
}
